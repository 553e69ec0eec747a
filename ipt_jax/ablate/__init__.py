"""`ipt ablate`: arms that differ in a few settings, trained from the same start over several seeds, and compared."""
