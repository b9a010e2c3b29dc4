"""The way in for any ``nn.Module``: torch.export, then one clean Program."""

from graphwright.frontends.torch.tracing import trace

__all__ = ["trace"]
