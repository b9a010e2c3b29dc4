"""The shortest way through: a model, a few passes, a smaller model that gives the same answers."""

import torch

import graphwright as gw

layer = torch.nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True)
model = torch.nn.TransformerEncoder(layer, 2).eval()
x = torch.randn(2, 16, 64)

small = gw.optimize(
    model,
    [gw.Cleanup(), gw.FuseAll(), gw.QuantizeLinears(bits=8, group_size=32)],
    example_inputs=x,
)
print(small.report)
print(small(torch.randn(5, 7, 64)).shape)  # any batch, any length; same call, same output type as the model
small.save("small")
