"""`synth eval`: scores a synthesizer, existing groups or the rules of `synth mine` on held-out pairs."""
