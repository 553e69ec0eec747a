"""`synth collect`: question-answering data sets become tuning documents."""
