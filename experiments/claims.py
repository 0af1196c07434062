"""The paper's effects that experiments/ measures again: differences of loss in nats per token (tables 3, 10, 12-14).

The paper evaluates expert-choice by top-k over whole sequences, which looks ahead; ours is causal, with topk beside.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One difference between two models."""

    experiment: str
    """Folder of experiments/."""
    says: str
    group: str
    """Group of runs that the claim is about."""
    baseline: str
    """Group that it is compared with."""
    paper: float
    """NLL of the first minus NLL of the second, as the paper's tables have it."""
    table: str


CLAIMS = (
    Claim("mor_vs_baselines", "MoR, N_r=2 against vanilla, equal FLOPs", "expert-r2", "vanilla", -0.0313, "3"),
    Claim("mor_vs_baselines", "MoR, N_r=3 against vanilla, equal FLOPs", "expert-r3", "vanilla", 0.0101, "3"),
    Claim("mor_vs_baselines", "recursive, N_r=3 against vanilla, equal FLOPs", "recursive-r3", "vanilla", 0.0642, "3"),
    Claim("mor_vs_baselines", "recursive, N_r=2 against vanilla, equal FLOPs", "recursive-r2", "vanilla", 0.0255, "3"),
    Claim("mor_vs_baselines", "MoR against recursive, N_r=3, equal FLOPs", "expert-r3", "recursive-r3", -0.0541, "3"),
    Claim("mor_vs_baselines", "MoR against recursive, N_r=2, equal FLOPs", "expert-r2", "recursive-r2", -0.0568, "3"),
    Claim(
        "mor_vs_baselines",
        "MoR, N_r=2 against vanilla, equal tokens",
        "expert-r2-equal-tokens",
        "vanilla",
        -0.0075,
        "3",
    ),
    Claim(
        "mor_vs_baselines", "MoR, N_r=3 against vanilla, equal tokens", "expert-r3-equal-tokens", "vanilla", 0.0422, "3"
    ),
    Claim("mor_vs_baselines", "token-choice against expert-choice, N_r=3", "token-r3", "expert-r3", 0.1238, "3"),
    Claim(
        "mor_vs_baselines", "shared keys and values against cached, N_r=3", "expert-r3-share", "expert-r3", 0.0058, "3"
    ),
    Claim("sharing", "cycle against middle_cycle, N_r=2", "cycle-r2", "middle_cycle-r2", 0.0192, "10"),
    Claim("sharing", "sequence against middle_cycle, N_r=2", "sequence-r2", "middle_cycle-r2", 0.1172, "10"),
    Claim(
        "sharing", "middle_sequence against middle_cycle, N_r=2", "middle_sequence-r2", "middle_cycle-r2", 0.1008, "10"
    ),
    Claim("sharing", "cycle against middle_cycle, N_r=3", "cycle-r3", "middle_cycle-r3", 0.0603, "10"),
    Claim("sharing", "sequence against middle_cycle, N_r=3", "sequence-r3", "middle_cycle-r3", 0.1485, "10"),
    Claim(
        "sharing", "middle_sequence against middle_cycle, N_r=3", "middle_sequence-r3", "middle_cycle-r3", 0.0993, "10"
    ),
    Claim("routers", "auxiliary loss 0.1 against 0.001", "expert-loss-0.1", "expert-recipe", 0.1749, "13"),
    Claim("routers", "auxiliary loss 0.01 against 0.001", "expert-loss-0.01", "expert-recipe", 0.0300, "13"),
    Claim("routers", "MLP router against linear", "expert-mlp", "expert-recipe", 0.0149, "13"),
    Claim("routers", "auxiliary router against auxiliary loss", "expert-aux-router", "expert-recipe", 0.0226, "13"),
    Claim("routers", "random selection against the router's", "expert-random", "expert-recipe", 0.0668, "13"),
    Claim("routers", "router z-loss against none", "expert-z-loss", "expert-recipe", 0.0157, "13"),
    Claim(
        "routers", "token-choice against expert-choice, equal tokens", "token-recipe", "expert-recipe", 0.0691, "13, 14"
    ),
    Claim("routers", "MLP token router against linear", "token-mlp", "token-recipe", 0.0881, "14"),
    Claim("routers", "loss-free balancing against a loss", "token-loss-free", "token-recipe", -0.0277, "14"),
    Claim("recursions", "MoR, N_r=4 against N_r=2, equal FLOPs", "expert-r4", "expert-r2", 0.0693, "3"),
    Claim("capacity", "capacity warm-up against none", "warm-up", "default", 0.0077, "13"),
    Claim("kv_sharing", "shared keys and values, expert-choice", "expert-shared", "expert-recursion", 0.0058, "3"),
    Claim("uptraining", "average against stepwise", "recursive-average", "recursive-stepwise", 0.0514, "12"),
    Claim("uptraining", "upper against stepwise", "recursive-upper", "recursive-stepwise", -0.0195, "12"),
    Claim("uptraining", "lower against stepwise", "recursive-lower", "recursive-stepwise", 0.0649, "12"),
    Claim("uptraining", "random against stepwise", "recursive-random", "recursive-stepwise", -0.0070, "12"),
)
