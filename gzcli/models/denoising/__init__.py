"""What diffusion, score and flow-matching models share: guidance, samplers, schedules and applications."""
