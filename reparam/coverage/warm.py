"""Imported once in the process that all others are forked from: what a first plan would import on its way."""

from __future__ import annotations

import contextlib

import torch

import reparam
import reparam.coverage.measure

# An error here would end the process that all others come from; each model shows its own.
with contextlib.suppress(Exception), torch.device("meta"):
    reparam.plan(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3)), 2)
