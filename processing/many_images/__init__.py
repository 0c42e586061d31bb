"""Work on many images: sources of images, workers that turn an image into a row, and engines that run them."""
