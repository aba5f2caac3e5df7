"""Loss surfaces of two environments, where rules lead on them, and the patchwork example."""
