"""What differs between two Cola DLMs beside their tensors."""

from cola_megatron.config.parametrization import without_parametrization
from cola_megatron.families.cola.published import FOLDERS, forms_of
from cola_megatron.families.cola.published_configs import REMARKS
from cola_megatron.interop.differences import Unequal, unequal
from cola_megatron.interop.weight_source import ModelSource


def compare_sources(first: ModelSource, second: ModelSource) -> tuple[list[Unequal], list[Unequal]]:
    """The keys that make another model, and the remarks: how a tensor is stored, and what says nothing of the model.

    Keys of config.json where both models have one, else of our model section; a prior that is not there has none.
    """
    both = all(any(name.startswith("dit.") for name in source.shapes) for source in (first, second))
    trees = (without_parametrization(source.config.model_dump(mode="json")) for source in (first, second))
    ours = [each for each in unequal("model.", *trees) if both or not each.name.startswith("model.dit.")]
    forms, others = forms_of(first.imported), forms_of(second.imported)
    if forms is None or others is None:
        return ours, []
    # This one is said by tensors, not by config.json.
    found = [each for each in ours if each.name == "model.dit.rotary_precision"]
    remarks: list[Unequal] = []
    for part in sorted(forms.keys() & others.keys()):
        folder, own = FOLDERS[part], (forms[part], others[part])
        for each in unequal("", *(form.config for form in own)):
            named = each._replace(name=f"{folder}/config.json: {each.name}")
            (remarks if each.name in REMARKS else found).append(named)
        remarks += unequal(f"{folder}: type of ", *(form.dtypes for form in own))
        remarks += unequal(f"{folder}: values of ", *(form.frequencies for form in own))
    return found, remarks
