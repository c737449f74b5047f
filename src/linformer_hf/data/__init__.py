"""Text in, training rows out: corpora, packing, masking, tasks, metrics."""
