"""`synth collect`: writes tuning documents from question-answering data sets."""
