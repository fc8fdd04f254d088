"""Tables, plots, report.html, model cards and the status of runs."""
