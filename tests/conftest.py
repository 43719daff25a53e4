import torch

# The tensors of the tests are small: a second thread only waits.
torch.set_num_threads(1)
