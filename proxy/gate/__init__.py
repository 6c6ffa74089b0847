"""The default-deny gate: the only package that knows a private name of mitmproxy."""

from proxy.gate.permit import CLEAR, Clear, Permit, Piece, Transform, TransformError, permit

__all__ = ["CLEAR", "Clear", "Permit", "Piece", "Transform", "TransformError", "permit"]
