"""Agent attention: a few pooled queries gather from all keys, and all queries read from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, MixerInputs, Statistic
from .parts.convolution import convolve, patch_moments, solve_convolution
from .parts.least_squares import check_finite, in_full_precision, second_moments, solve_ridge, squared_errors
from .parts.merging import match
from .parts.pooling import group_counts, group_means, one_image, to_members, without_masked
from .registry import register_mixer


@dataclass(frozen=True)
class AgentConfig(MixerConfig):
    """Settings of `AgentAttention`.

    Args:
        agents: how many, a square from 1 to 1024.
        kernel_size: side of the depthwise convolution of the values, odd, at most 31; 0 leaves it out.
        bias_size: side of the tables of position biases, which are resized to the grid, 1 to 64.
        sharpness: the queries' softmax over agents has scale D ** (-sharpness / 2): 1 is the paper's, 0.3 what its
            training-free form for Stable Diffusion takes; each head learns a factor on top.
        agent_ratio: above 0, agents are no cells but what is left when this share of the tokens is merged into those
            that are alike (see `TokenMergeAttention`), below 1; there are no biases then, and `agents` says nothing.
        merge_ratio: with it, this share of the tokens is merged before, below 1.
        rows, columns: of the cells that have one destination of merging each, 1 to 64.
        shortcut: with it, this times the (merged) values is added, -2 to 2.

    Raises:
        ValueError: a value out of range.
    """

    agents: int = 49
    kernel_size: int = 3
    bias_size: int = 7
    sharpness: float = 1.0
    agent_ratio: float = 0.0
    merge_ratio: float = 0.0
    rows: int = 4
    columns: int = 4
    shortcut: float = 0.0

    @classmethod
    def stable_diffusion(cls) -> AgentConfig:
        """As AgentSD sets it in the first 20 of its 50 steps, for the layers of full resolution; without training."""
        return cls(kernel_size=0, sharpness=0.3, agent_ratio=0.95, merge_ratio=0.4, shortcut=0.075)

    def __post_init__(self) -> None:
        for name, most in (("agents", 1024), ("kernel_size", 31), ("bias_size", 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ValueError(f"{name} is {value!r:.60}: pass a whole number up to {most}.")
        if self.agents < 1 or math.isqrt(self.agents) ** 2 != self.agents:
            raise ValueError(f"agents is {self.agents}: pass a square such as 16, 49 or 64.")
        if self.kernel_size and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}: pass an odd number, or 0 for no convolution.")
        if self.bias_size < 1:
            raise ValueError("bias_size is 0: pass 1 to 64.")
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
                raise ValueError(f"{name} is {value!r:.60}: pass 1 to 64.")
        for name, least, most in (
            ("sharpness", -2, 2),
            ("shortcut", -2, 2),
            ("agent_ratio", 0, 1),
            ("merge_ratio", 0, 1),
        ):
            value = getattr(self, name)
            below = most == 2 or value != 1
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not (least <= value <= most and below):
                raise ValueError(
                    f"{name} is {value!r:.60}: pass a number from {least} to {'' if below else 'below '}{most}."
                )
            object.__setattr__(self, name, float(value))
        for name in ("merge_ratio", "shortcut"):
            if getattr(self, name) and not self.agent_ratio:
                raise ValueError(f"{name} is {getattr(self, name)} without agent_ratio: it belongs to merged agents.")


@dataclass(frozen=True)
class AgentCalibration:
    """What the calibration of `AgentAttention` chooses from: factors on the scale of the queries' softmax, head by
    head, and the weight of the penalty in regressions."""

    factors: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    ridge: float = 1e-4


@register_mixer("agent")
class AgentAttention(Mixer):
    """Agents A are the queries, averaged over cells of the grid. With s = D ** -0.5 (or the layer's own scale), per
    head

        V_A = softmax(s A k^T + B_1) v,    out = softmax(s_h q A^T + B_2) V_A + conv(v),

    where B_1 and B_2 are tables of positions, each a square one, a row and a column one, resized to the grid. With
    `agent_ratio` (AgentSD), q, k and v are means over groups of merged tokens, A over larger groups, c v replaces the
    tables, and members take over what their group gets; where there are not twice as many tokens as agents, it is the
    softmax over the merged tokens.

    Parameters (zeros where not said otherwise, which change nothing):
        log_factor: [heads], s_h = D ** (-sharpness / 2) exp(log_factor).
        agent_bias, token_bias: [heads, agents, S, S], of B_1 and B_2; agent_rows, agent_columns, token_rows,
            token_columns: [heads, agents, S].
        conv_weight: [heads * head_dim, 1, K, K], conv_bias: [heads * head_dim]. Absent when `kernel_size` is 0.

    Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024.
    """

    Config = AgentConfig
    CalibrationSettings = AgentCalibration
    examples = (
        AgentConfig(),
        AgentConfig(agents=4, kernel_size=0),
        AgentConfig(agents=16, bias_size=3, sharpness=0.3),
        AgentConfig.stable_diffusion(),
        AgentConfig(agent_ratio=0.7, merge_ratio=0.2, rows=2, columns=2, shortcut=0.1),
    )
    summary = "softmax from all keys to a few pooled queries, and from these to all queries"
    cost = "O(N); O(N^2) / 8 with merged agents"
    source = "Han et al., Agent Attention, ECCV 2024"
    needs = frozenset({"grid"})
    supports = frozenset({"mask", "text", "window", "compile"})

    def __init__(self, config: AgentConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        heads, channels, size = layer.heads, layer.heads * layer.head_dim, config.kernel_size
        self.log_factor = nn.Parameter(torch.zeros(heads))
        table = None if config.agent_ratio else (heads, config.agents, config.bias_size)
        if table is None:
            self.needs = frozenset({"grid", "hidden_states"})
        else:
            self.agent_bias, self.token_bias = (nn.Parameter(torch.zeros(*table, table[-1])) for _ in range(2))
            self.agent_rows, self.agent_columns = (nn.Parameter(torch.zeros(table)) for _ in range(2))
            self.token_rows, self.token_columns = (nn.Parameter(torch.zeros(table)) for _ in range(2))
        self.conv_weight = nn.Parameter(torch.zeros(channels, 1, size, size)) if size else None
        self.conv_bias = nn.Parameter(torch.zeros(channels)) if size else None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`. Raises ValueError unless the grid is of one image that the tokens fill."""
        attended = self.attend(query, key, value, context)
        if self.conv_weight is None:
            return Mixed(attended)
        grid = one_image(context, query.shape[1], "Agent attention")
        local = convolve(value, self.conv_weight, self.conv_bias, grid, context.key_mask)
        return Mixed(attended + local.to(attended.dtype))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """`forward` without the convolution, [B, N, H, D]."""
        if self.config.agent_ratio:
            return self._attend_merged(query, key, value, context)
        grid, mask = one_image(context, query.shape[1], "Agent attention"), context.key_mask
        agents = self._agents(query, grid)
        queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, N, D]
        scale = context.softmax_scale(query)
        gather = self._bias(self.agent_bias, self.agent_rows, self.agent_columns, grid).to(query.dtype)[None]
        if mask is not None:  # whatever a masked slot holds, NaN included, is never read
            keys, values = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (keys, values))
            kept = mask | ~mask.any(dim=1, keepdim=True)  # without any key, the zeros are averaged
            gather = gather.expand(len(query), -1, -1, -1).masked_fill(~kept[:, None, None, :], -torch.inf)
        gathered = F.scaled_dot_product_attention(agents, keys, values, gather, scale=scale)
        spread = self._bias(self.token_bias, self.token_rows, self.token_columns, grid).to(query.dtype)
        queries = queries * self.head_scale(context, query).to(query.dtype)[:, None, None]
        out = F.scaled_dot_product_attention(queries, agents, gathered, spread.transpose(1, 2)[None], scale=1.0)
        return out.transpose(1, 2)

    def _attend_merged(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """`attend` with merged tokens and agents."""
        mask, scale = context.key_mask, context.softmax_scale(query)
        (group, groups), (of_agent, agents) = self._groups(query, context)
        queries = group_means(query, group, groups, None)
        keys, values = (group_means(x, group, groups, mask) for x in (key, value))
        keep = None
        if mask is not None:
            keep = group_counts(group, groups, mask, torch.float32) > 0
            keep = (keep | ~mask.any(dim=1, keepdim=True))[:, None, None]  # without any key, the zeros are averaged
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        if 2 * agents >= groups:
            out = F.scaled_dot_product_attention(q, k, v, keep, scale=scale)
            return to_members(out.transpose(1, 2), group)
        a = group_means(query, of_agent, agents, None).transpose(1, 2)
        return to_members(self.through(q, a, k, v, keep, context).transpose(1, 2), group)

    def through(
        self,
        query: torch.Tensor,
        agents: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keep: torch.Tensor | None,
        context: Context,
    ) -> torch.Tensor:
        """softmax(s_h q A^T) softmax(s A k^T) v + c v, [B, H, N, D], for agents [B, H, n, D]; keep: bool, over keys."""
        gathered = F.scaled_dot_product_attention(agents, key, value, keep, scale=context.softmax_scale(query))
        query = query * self.head_scale(context, query).to(query.dtype)[:, None, None]
        out = F.scaled_dot_product_attention(query, agents, gathered, scale=1.0)
        return out + self.config.shortcut * value

    def _groups(self, query: torch.Tensor, context: Context) -> list[tuple[torch.Tensor, int]]:
        """Of merged tokens and of agents: see `match`."""
        grid, hidden = one_image(context, query.shape[1], "Agent attention"), context.hidden_states
        assert hidden is not None, "its needs say so"
        cell, ratios = (self.config.rows, self.config.columns), (self.config.merge_ratio, self.config.agent_ratio)
        return [match(hidden, grid, cell, int(ratio * query.shape[1]), context.key_mask) for ratio in ratios]

    def _merged_reference(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """`_attend_merged` with matrices of who belongs where."""
        mask, scale = context.key_mask, context.softmax_scale(query)
        key, value = (without_masked(x, mask) for x in (key, value))
        members, of_agent = (F.one_hot(g, n).to(query.dtype) for g, n in self._groups(query, context))  # [B, N, groups]
        kept = members if mask is None else members * mask[..., None].to(query.dtype)
        mean, agent_mean, key_mean = (m / m.sum(1, keepdim=True).clamp(min=1.0) for m in (members, of_agent, kept))
        q, a = (torch.einsum("bng,bnhd->bhgd", m, query) for m in (mean, agent_mean))
        k, v = (torch.einsum("bng,bnhd->bhgd", key_mean, x) for x in (key, value))
        counts = kept.sum(1)
        gone = (counts == 0) & counts.any(dim=1, keepdim=True)
        if 2 * a.shape[2] >= q.shape[2]:
            out = (q @ k.transpose(2, 3) * scale).masked_fill(gone[:, None, None], -torch.inf).softmax(-1) @ v
        else:
            gathered = (a @ k.transpose(2, 3) * scale).masked_fill(gone[:, None, None], -torch.inf).softmax(-1) @ v
            sharp = self.head_scale(context, query).to(q.dtype)[:, None, None]
            out = (q @ a.transpose(2, 3) * sharp).softmax(-1) @ gathered + self.config.shortcut * v
        return torch.einsum("bng,bhgd->bnhd", members, out)

    def head_scale(self, context: Context, query: torch.Tensor) -> torch.Tensor:
        """[H], of the queries' softmax, at least float32."""
        factor = self.log_factor.to(torch.promote_types(self.log_factor.dtype, torch.float32)).exp()
        return factor * context.softmax_scale(query) ** self.config.sharpness

    def _agents(self, query: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, H, agents, D]: the queries averaged over cells, which overlap where the grid is no multiple."""
        batch, _, heads, head_dim = query.shape
        side = math.isqrt(self.config.agents)
        images = query.permute(0, 2, 3, 1).reshape(batch, heads * head_dim, *grid)
        return F.adaptive_avg_pool2d(images, side).reshape(batch, heads, head_dim, -1).transpose(2, 3)

    def _bias(
        self, table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """[H, agents, N] for the tokens of the grid."""
        whole = _resized(table, grid)
        whole = whole + _resized(rows[..., None], (grid[0], 1)) + _resized(columns[..., None, :], (1, grid[1]))
        return whole.flatten(2)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """Both softmaxes as matrices."""
        if self.config.agent_ratio:
            mixed = self._merged_reference(query, key, value, context)
            if self.conv_weight is not None:
                grid = one_image(context, query.shape[1], "Agent attention")
                mixed = mixed + convolve(value, self.conv_weight, self.conv_bias, grid, context.key_mask)
            return Mixed(mixed)
        grid, mask = one_image(context, query.shape[1], "Agent attention"), context.key_mask
        agents = self._agents(query, grid)
        if mask is not None:
            key, value = (x.masked_fill(~mask[:, :, None, None], 0.0) for x in (key, value))
        gather = torch.einsum("bhad,bnhd->bhan", agents, key) * context.softmax_scale(query)
        gather = gather + self._bias(self.agent_bias, self.agent_rows, self.agent_columns, grid).to(gather.dtype)
        if mask is not None:
            gather = gather.masked_fill(~(mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :], -torch.inf)
        spread = torch.einsum("bnhd,bhad->bhna", query, agents)
        spread = spread * self.head_scale(context, query).to(spread.dtype)[:, None, None]
        bias = self._bias(self.token_bias, self.token_rows, self.token_columns, grid).to(spread.dtype)
        weights = (spread + bias.transpose(1, 2)).softmax(-1) @ gather.softmax(-1)
        mixed = torch.einsum("bhnm,bmhd->bnhd", weights, value)
        if self.conv_weight is not None:
            mixed = mixed + convolve(value, self.conv_weight, self.conv_bias, grid, mask)
        return Mixed(mixed)

    def calibrate(self, layer: CalibratedLayer, settings: AgentCalibration | None) -> Calibration:
        """Each head's factor, by what its output and its values leave of the softmax. Returns the factors."""
        settings = settings or AgentCalibration()
        start = self.log_factor.detach().clone()

        def measure(call: LayerCall) -> torch.Tensor:
            return torch.stack([self._moments(call, start + math.log(factor)) for factor in settings.factors])

        (second,) = yield Statistic(measure, layer.selection)
        check_finite(layer.name, second)
        head_dim = self.layer.head_dim
        left = squared_errors(second, solve_ridge(second, second.shape[-1] - 1 - head_dim, settings.ridge))
        best = torch.tensor(settings.factors)[left.argmin(0)]
        with torch.no_grad():
            self.log_factor.copy_(start + best.log().to(start.device, start.dtype))
        return tuple(best.tolist())

    @in_full_precision
    def _moments(self, call: LayerCall, log_factor: torch.Tensor) -> torch.Tensor:
        """[H, F + 1 + D, F + 1 + D], see `second_moments`, with other factors."""
        kept = self.log_factor.detach().clone()
        inputs = _float(call.inputs)
        try:
            self.log_factor.copy_(log_factor)
            attended = self.attend(inputs.query, inputs.key, inputs.value, inputs.context)
        finally:
            self.log_factor.copy_(kept)
        features = torch.cat([inputs.shared(attended), inputs.shared(inputs.value)], dim=-1)
        wanted = call.product if inputs.rest is None else call.product - inputs.rest
        features, targets = (x.permute(2, 0, 1, 3).flatten(1, 2) for x in (features, wanted))
        return second_moments(features, targets, call.weights.token_roots(wanted))

    def refine(self, layer: CalibratedLayer, settings: AgentCalibration | None) -> Calibration:
        """The depthwise kernel and bias: least squares on what the agents miss of the softmax."""
        if self.conv_weight is None or self.conv_bias is None:
            return
        weight, bias, ridge = self.conv_weight, self.conv_bias, (settings or AgentCalibration()).ridge

        def measure(call: LayerCall) -> torch.Tensor:
            inputs = call.inputs
            attended = self.attend(inputs.query, inputs.key, inputs.value, inputs.context)
            missing = call.target() - inputs.join(attended).float()
            return patch_moments(inputs, missing, self.config.kernel_size, call.weights)

        (moments,) = yield Statistic(measure)
        solve_convolution(layer.name, moments, weight, bias, ridge)


def _resized(table: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[H, n, ...] -> [H, n, *size], bilinear; as it is where it fits."""
    return table if table.shape[-2:] == size else F.interpolate(table, size=size, mode="bilinear", align_corners=False)


def _float(inputs: MixerInputs) -> MixerInputs:
    return MixerInputs(
        inputs.query.float(), inputs.key.float(), inputs.value.float(), inputs.context, inputs.rest, inputs.share
    )
