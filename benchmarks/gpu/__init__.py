"""What only a GPU can show, part by part: ``python -m benchmarks.gpu`` (see ``__main__``)."""
