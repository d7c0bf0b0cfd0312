"""From an engine directory to pictures: the denoising loop and what surrounds it. No torch, no diffusers."""
