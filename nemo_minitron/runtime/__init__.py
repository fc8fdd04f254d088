"""Process groups, start-up and the CPU stand-in."""
