"""Search spaces and tuners: pure, ask and tell, no training."""
