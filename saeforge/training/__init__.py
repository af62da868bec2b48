"""Training under Lightning: a thin host for variants, the data module, the RUN folder, and `train()`."""
