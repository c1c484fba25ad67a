"""How fast a placement will be: the roofline of every layer in every place, and of all of them together."""

from __future__ import annotations

from collections.abc import Sequence

from hymoe.runtime.bandwidth import PACE_TYPE
from hymoe.runtime.layout import Layer, Layout
from hymoe.runtime.machine import Device, Machine, repacks, stream_device
from hymoe.runtime.placement import Run
from hymoe.runtime.planned import RAM, Setting, Speeds
from hymoe.runtime.roofline import NOTHING, Rates, Roofline, Time, Use, device_rates, host_rates
from hymoe.runtime.tune import Tuned


class Costs:
    """What each layer costs in each place, for one setting and one set of devices."""

    def __init__(
        self,
        layout: Layout,
        machine: Machine,
        use: Use,
        devices: Sequence[Device],
        *,
        setting: Setting,
        tuned: Tuned | None = None,
    ) -> None:
        repacked = layout.share_of(PACE_TYPE) if setting.repack and repacks(devices) else 0.0
        self.host = host_rates(machine, tuned, repacked=repacked)
        self.rates = [device_rates(device, machine) for device in devices]
        target = stream_device(devices)
        stream = next((rates for device, rates in zip(devices, self.rates, strict=True) if device is target), None)
        self.use = use
        self.layout = layout
        self.roofline = Roofline(
            layout,
            use,
            setting.n_ubatch,
            layout.kv_bytes(setting.n_ctx, setting.kv_type) / setting.n_ctx,
            self.host,
            stream if setting.stream_from is not None else None,
            setting.stream_from or 0,
        )
        self._known: dict[tuple[Layer, int, int], Time] = {}

    def layer(self, layer: Layer, home: Rates, experts: Rates) -> Time:
        """Give the time of a layer; most are alike."""
        key = (layer, id(home), id(experts))
        if key not in self._known:
            self._known[key] = self.roofline.layer(layer, home, experts)
        return self._known[key]

    def all(self, home: Rates, experts: Rates) -> tuple[float, ...]:
        """Give the seconds of each layer for the whole use."""
        return tuple(self.layer(layer, home, experts).total(self.use) for layer in self.layout.layers)

    def total(self, runs: Sequence[Run]) -> Time:
        """Give the time of a whole placement."""
        time = NOTHING
        layers = self.layout.layers
        for layer in layers[: runs[0].first if runs else len(layers)]:
            time += self.layer(layer, self.host, self.host)
        for rates, run in zip(self.rates, runs, strict=True):
            time += self.roofline.boundary(rates)
            for index in range(run.first, run.last):
                time += self.layer(layers[index], rates, rates if index in run.experts else self.host)
        return time + self.roofline.output(self.rates[-1] if runs else self.host)


def speeds(costs: Costs, runs: Sequence[Run], devices: Sequence[Device], time: Time) -> Speeds:
    """Say how fast, what is read, and what takes most of the time."""
    use, layers = costs.use, costs.layout.layers
    read = dict.fromkeys([*(device.name for device in devices), RAM], 0.0)
    home = {
        index: device.name for device, run in zip(devices, runs, strict=True) for index in range(run.first, run.last)
    }
    with_experts = {index for run in runs for index in run.experts}
    depth = use.n_prompt + use.n_answer / 2
    for index, layer in enumerate(layers):
        name = home.get(index, RAM)
        read[name] += layer.dense + depth * costs.roofline.kv_row
        read[name if index in with_experts else RAM] += costs.roofline.expert_bytes(layer)
    read[devices[-1].name if devices else RAM] += costs.layout.output
    rates = dict(zip(read, [*costs.rates, costs.host], strict=True))
    seconds = {name: n / rates[name].read for name, n in read.items()}
    parts = {f"reading {name}": n for name, n in seconds.items()}
    parts["attention on the processor"] = (len(layers) - len(home)) * costs.roofline.attention(costs.host)
    limit = max(parts, key=lambda part: parts[part])
    share = 100 * parts[limit] / time.token
    return Speeds(
        use.n_prompt / time.prefill,
        1 / time.token,
        {name: round(n) for name, n in read.items()},
        _prefill_limit(costs, home, with_experts, time),
        f"{limit} ({share:.0f} % of the time)",
        {name: rates[name].read for name, n in read.items() if n},
        {name: rates[name].source for name, n in read.items() if n},
    )


def _prefill_limit(costs: Costs, home: dict[int, str], with_experts: set[int], time: Time) -> str:
    roofline = costs.roofline
    layers = costs.layout.layers
    left = sum(layer.experts for index, layer in enumerate(layers) if index not in with_experts and not layer.is_last)
    if roofline.stream is not None:
        sent = left / roofline.stream.link * (costs.use.n_prompt // roofline.n_ubatch)
        if sent > time.prefill / 2:
            return f"sending experts to the GPU ({100 * sent / time.prefill:.0f} % of the time)"
    elif left:
        return "the processor's operations"
    return "the GPU's operations" if home else "the processor's operations"
