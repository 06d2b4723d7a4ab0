"""The mathematics: schedules, uniform-state and absorbing diffusion, the duality. Arrays in, arrays out."""
