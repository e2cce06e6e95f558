"""Members as LoRA adapters, in PEFT's file format."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..evolution import Member
from ..noise.shapes import Factors
from ..weights.shard import Shard
from ..weights.store import Weights


WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in that file

# What the file has of a module, given its name, what members add to its weight, and the number of one of them
Form = Callable[[str, Factors, int], dict[str, torch.Tensor]]


def of_linear(module: str, factors: Factors, number: int) -> dict[str, torch.Tensor]:
    """Of a linear layer, whose weight has shape `(outputs, inputs)`."""
    return {
        f"{PREFIX}{module}.lora_A.weight": factors.right[number, 0].cpu(),
        f"{PREFIX}{module}.lora_B.weight": factors.left[number, 0].T.cpu().contiguous(),
    }


def of_transposed_linear(module: str, factors: Factors, number: int) -> dict[str, torch.Tensor]:
    """Of a linear layer as GPT-2 has it, whose weight has shape `(inputs, outputs)`."""
    return of_linear(module, Factors(left=factors.right, right=factors.left), number)


def of_embedding(module: str, factors: Factors, number: int) -> dict[str, torch.Tensor]:
    """Of an embedding, whose weight has shape `(tokens, width)`."""
    a, b = of_transposed_linear(module, factors, number).values()
    return {f"{PREFIX}{module}.lora_embedding_A": a, f"{PREFIX}{module}.lora_embedding_B": b}


FORMS: dict[type[nn.Module], Form] = {
    nn.Linear: of_linear,
    Conv1D: of_transposed_linear,
    nn.Embedding: of_embedding,
}


class MemberAdapters:
    """
    Writes members as LoRA adapters of the unperturbed model.

    Weights of linear layers and embeddings become matrices of the noise's rank, with a scaling of 1. Biases of these
    layers are saved as with PEFT's `bias="all"`, and the modules of other vectors, such as norms, whole, as with
    `modules_to_save`. Where modules share a weight, as tied embeddings do, each of them gets its perturbation: the
    model computes what it would with the perturbed weight. PEFT's `merge_and_unload` would add the perturbation to
    the shared weight once for each, so adapters of such a model must not be merged.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        weights ([`Weights`]):
            Its trained weights, with low-rank perturbations. Files have the dtypes in which they were given.

    Raises:
        `ValueError`: If adapters cannot carry a trained parameter; names it.
    """

    def __init__(self, model: PreTrainedModel, weights: Weights):
        self.weights = weights
        places = [(shard, *place) for shard in weights.shards for place in _places(model, shard)]
        self._layers = [
            (shard, name, form)
            for shard, name, parameter, module in places
            if parameter == "weight" and (form := _form(module)) is not None
        ]
        layers = {name for _, name, _ in self._layers}
        self._biases: list[tuple[Shard, str]] = []
        self._vectors: list[tuple[Shard, str]] = []
        self._saved: dict[str, nn.Module] = {}  # modules that are saved whole
        for shard, name, parameter, module in places:
            if name in layers and parameter == "weight":
                continue
            if name in layers and len(shard.shape) == 1:
                self._biases.append((shard, f"{name}.base_layer.{parameter}"))
            elif len(shard.shape) == 1 and not list(module.children()):
                self._vectors.append((shard, f"{name}.{parameter}"))
                self._saved[name] = module
            else:
                raise ValueError(
                    f"LoRA adapters cannot carry the trained parameter `{shard.name}` of shape {list(shard.shape)}, "
                    "but only weights of linear layers and embeddings, and vectors. So members of this model cannot "
                    "be saved: leave out `top_members` to rebuild the trained model."
                )
        self._is_tied = len(self._layers) > len({shard.name for shard, *_ in self._layers})
        self._has_transposed = any(form is of_transposed_linear for *_, form in self._layers)

    def save(self, member: Member, sigma: float, folder: Path, base_model: str) -> None:
        """
        Write the adapter of a member into a folder.

        Args:
            member ([`Member`]):
                The member.
            sigma (`float`):
                Standard deviation of its noise.
            folder (`Path`):
                Where to. It must not exist.
            base_model (`str`):
                Folder of the unperturbed model.
        """
        # Imported where it is used: importing peft takes seconds
        from peft import LoraConfig

        tensors = {}
        for shard, name, form in self._layers:
            tensors |= form(name, self._of_member(shard, member, sigma), 0)
        for name, module in self._saved.items():
            tensors |= {f"{PREFIX}{name}.{key}": value.cpu() for key, value in module.state_dict().items()}
        for shard, name in (*self._biases, *self._vectors):
            tensors[f"{PREFIX}{name}"] = self._of_member(shard, member, sigma)[0].cpu()
        folder.mkdir(parents=True)
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        rank = self.weights.perturbation.rank
        LoraConfig(
            base_model_name_or_path=base_model,
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=rank,
            target_modules=[name for _, name, _ in self._layers],
            modules_to_save=list(self._saved),
            bias="all" if self._biases else "none",
            fan_in_fan_out=self._has_transposed,
            ensure_weight_tying=self._is_tied,
            inference_mode=True,
        ).save_pretrained(folder)

    def _of_member(self, shard: Shard, member: Member, sigma: float) -> Factors | torch.Tensor:
        return self.weights.of_members(shard, [member], sigma, shard.checkpoint_dtype)


def _places(model: nn.Module, shard: Shard) -> Iterator[tuple[str, str, nn.Module]]:
    """The modules that a parameter belongs to, of which tied ones have several: name, the parameter's name, module."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is shard.parameter:
            module_name, _, parameter_name = name.rpartition(".")
            yield module_name, parameter_name, model.get_submodule(module_name)


def _form(module: nn.Module) -> Form | None:
    return next((form for kind, form in FORMS.items() if isinstance(module, kind)), None)
