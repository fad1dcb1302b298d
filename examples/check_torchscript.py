"""Loads a TorchScript model, runs a saved batch and compares with saved outputs, bit for bit.

python examples/check_torchscript.py MODEL.pt BATCH.pt OUTPUTS.pt
"""

import sys
import warnings

import torch

import qtoolkit  # noqa: F401  (registers the operators that the model calls)

warnings.filterwarnings("ignore", message=".*torch.jit.*")  # announced to go
model_file, batch_file, outputs_file = sys.argv[1:]
model = torch.jit.load(model_file)
batch = torch.load(batch_file, weights_only=True)
expected = torch.load(outputs_file, weights_only=True)
with torch.inference_mode():
    outputs = model(batch)
if not torch.equal(outputs, expected):
    different = (outputs != expected).sum().item()
    sys.exit(f"{model_file}: {different} of {expected.numel()} outputs differ from the saved ones")
print(f"{model_file}: {expected.numel()} outputs equal to the converted model's, bit for bit")
