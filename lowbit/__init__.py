"""From a Hugging Face checkpoint to a 4-, 3- or 2-bit model that runs, and that is proven to be the model you asked for."""
