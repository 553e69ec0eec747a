"""`synth run`: generates question-answer pairs for raw texts."""
