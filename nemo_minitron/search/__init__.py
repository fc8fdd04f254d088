"""Which shapes to consider (2407.14679, section 2.3), and which are worth having. No torch."""
