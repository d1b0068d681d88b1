"""One file a model: what a training knows of it."""
