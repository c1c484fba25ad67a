"""HunYuan mixture-of-experts models at home: convert, quantize, place, talk."""

__version__ = "0.1.0"
