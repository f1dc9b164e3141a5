"""The tools that `bench.py --peers` times beside this one, each called as its users call it.

A builder imports its tool and returns the function to time; a KeyError says which loss a tool has
not. They want torchvision, see docs/speed.md. Weights are handed over, never downloaded.
"""
import copy
from functools import partial
from pkgutil import resolve_name

import torch

import core


def copies(trainer):
    """G, D and Adams as other tools' users have them, in the default memory format, with PyTorch's
    LeakyReLU and Adam as it comes; one batch of real images, and cfg."""
    cfg, nets = trainer.cfg, copy.deepcopy([trainer.G, trainer.D])
    for net in nets:
        net.to(memory_format=torch.contiguous_format)
        for i, layer in enumerate(net):
            if isinstance(layer, core.LeakyReLU):
                net[i] = torch.nn.LeakyReLU(0.2)
    opts = [torch.optim.Adam(net.parameters(), lr, (cfg.beta1, cfg.beta2))
            for net, lr in zip(nets, (cfg.lr_g, cfg.lr_d))]
    return *nets, *opts, trainer.real().contiguous(), cfg


def torchgan(trainer):
    """It has no hinge loss, and takes the penalty in an optimizer step of its own."""
    from torchgan import losses
    kinds = {"wgan": (losses.WassersteinGeneratorLoss, losses.WassersteinDiscriminatorLoss,
                      losses.WassersteinGradientPenalty),
             "lsgan": (losses.LeastSquaresGeneratorLoss, losses.LeastSquaresDiscriminatorLoss)}
    G, D, opt_g, opt_d, x_real, cfg = copies(trainer)
    on_g, *on_d = [kind() for kind in kinds[cfg.loss]]
    G.encoding_dims, G.label_type, D.label_type = cfg.z_dim, "none", "none"

    def update():       # an iteration: n_dis of D, one of G
        for loss in on_d * cfg.n_dis:
            loss.train_ops(G, D, opt_d, x_real, x_real.device)
        on_g.train_ops(G, D, opt_g, x_real.device, len(x_real))
    return update


def mimicry(trainer):
    """It has no least-squares loss. Our layers, its training step."""
    from torch_mimicry.nets.gan import gan
    from torch_mimicry.nets.wgan_gp import wgan_gp_base as wgan
    from torch_mimicry.training.metric_log import MetricLog
    kinds = {"wgan": (wgan.WGANGPBaseGenerator, wgan.WGANGPBaseDiscriminator, "wasserstein"),
             "hinge": (gan.BaseGenerator, gan.BaseDiscriminator, "hinge")}
    G, D, opt_g, opt_d, x_real, cfg = copies(trainer)
    *bases, loss = kinds[cfg.loss]
    for net, base in zip((G, D), bases):
        net.__class__ = type("Hosted", (type(net), base), {})
        net.nz, net.gp_scale, net.loss_type = cfg.z_dim, cfg.gp_weight, loss
    batch, log = (x_real, None), MetricLog()

    def update():
        for _ in range(cfg.n_dis):
            D.train_step(batch, G, opt_d, log, x_real.device)
        G.train_step(batch, D, opt_g, log, x_real.device)
    return update


def inception(path, weights, x, pixels=lambda x: x, **how):
    """pytorch-fid's, or clean-fid's, which has it too, with our weights, on uint8 (B, 3, H, W)."""
    module = resolve_name(path)
    module.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights)
    net = module.InceptionV3([3], **how).eval().to(x.device)
    return lambda: net(pixels(x) / 255)[0].flatten(1)


def clean_fid(weights, x):
    """With its resizing, image by image. The form of the network that needs no other download."""
    resize = resolve_name("cleanfid.resize:build_resizer")("clean")
    return inception("cleanfid.inception_pytorch", weights, x, lambda x: torch.stack([
        torch.tensor(resize(image).transpose(2, 0, 1))      # in the default memory format
        for image in x.permute(0, 2, 3, 1).cpu().numpy()]).to(x.device), resize_input=False)


def fidelity(path, weights, x):
    """torch-fidelity's network, or torchmetrics' heir of it: they take a weights file."""
    return partial(resolve_name(path)("2015", ["2048"], str(weights)).to(x.device), x)


def torch_fidelity_distance(arrays, tensors):
    distance = resolve_name("torch_fidelity.metric_fid:fid_statistics_to_metric")
    one, two = ({"mu": mu, "sigma": cov} for mu, cov in (arrays[:2], arrays[2:]))
    return lambda: distance(one, two, False)["frechet_inception_distance"]


TRAIN = {"torchgan": torchgan, "torch-mimicry": mimicry}
FEATURES = {
    "pytorch-fid": partial(inception, "pytorch_fid.inception"), "clean-fid": clean_fid,
    "torch-fidelity": partial(fidelity, "torch_fidelity:FeatureExtractorInceptionV3"),
    "torchmetrics": partial(fidelity, "torchmetrics.image.fid:NoTrainInceptionV3")}
DISTANCE = {
    "pytorch-fid": lambda arrays, tensors: partial(
        resolve_name("pytorch_fid.fid_score:calculate_frechet_distance"), *arrays),
    "clean-fid": lambda arrays, _: partial(resolve_name("cleanfid.fid:frechet_distance"), *arrays),
    "torch-fidelity": torch_fidelity_distance,
    "torchmetrics": lambda arrays, tensors: partial(
        resolve_name("torchmetrics.image.fid:_compute_fid"), *tensors)}
