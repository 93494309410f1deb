"""Apache TVM: encoders and decoders as one compiled library, with products and attention of our own in its language."""
