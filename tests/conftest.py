import torch

# The tests use small tensors: a second thread would only wait.
torch.set_num_threads(1)
