"""From a data set's images and captions to a training folder: garment masks, and the phrases that name them."""
