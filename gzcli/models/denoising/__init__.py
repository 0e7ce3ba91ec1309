"""The core of diffusion, score and flow-matching models: processes, guidance, samplers, applications."""
