"""Model families: each is a table of parameters (data) plus a config mapping."""
