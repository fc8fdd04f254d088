"""What people look at: console output, tables and report.html."""
