"""Ray-distributed scale-out trainer for Decoupled Proxy Alignment (arXiv 2509.14735)."""

__version__ = "0.1.0"
