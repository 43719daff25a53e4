import torch

from ess_rl.transitions import Transitions, flat_samples


def test_flat_samples_keep_what_belongs_together():
    """Two steps of three environments: the sample of step t in environment n is number 3 t + n."""
    rollout = Transitions.empty((2, 3), 5, 1, torch.device("cpu"))
    number = torch.arange(6.0).view(2, 3)
    rollout.action[..., 0], rollout.behavior_mean[..., 0], rollout.behavior_log_std[..., 0] = number, -number, 1.0
    samples = flat_samples(rollout, obs=rollout.obs, advantage=10.0 * number)
    assert samples.keys() == {"action", "behavior_mean", "behavior_log_std", "obs", "advantage"}
    assert samples["obs"].shape == (6, 5) and samples["action"].shape == (6, 1)
    assert samples["action"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert samples["behavior_mean"][:, 0].tolist() == [0, -1, -2, -3, -4, -5]
    assert samples["advantage"].tolist() == [0, 10, 20, 30, 40, 50]
