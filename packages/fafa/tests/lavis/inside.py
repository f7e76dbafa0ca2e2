"""Run with the interpreter of the LAVIS environment: the work of test_lavis.py, done by LAVIS's own ViT and Q-Former."""

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import torch  # noqa: E402
from lavis.common.registry import registry  # noqa: E402
from lavis.models import load_model_and_preprocess  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import fafa.lavis_plugin  # noqa: E402
from fafa.model.weights import load_official_state_dict, official_state_dict  # noqa: E402

folder = Path(sys.argv[1])
torch.set_num_threads(1)
assert registry.get_model_class("blip2_fafa_cpr") is fafa.lavis_plugin.LavisFAFACPR
for kind in ("eva_clip_g", "clip_L"):
    model, images, text = load_model_and_preprocess("blip2_fafa_cpr", str(folder / f"{kind}.yaml"), is_eval=True)
    assert not model.training and next(model.parameters()).dtype == torch.float32
    result = load_official_state_dict(model, load_file(folder / f"{kind}.safetensors"), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert {type(module).__module__.split(".")[0] for module in (model.visual_encoder, model.Qformer.bert)} == {"lavis"}
    work = load_file(folder / "work.safetensors")
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    found = dict(zip(("features", "embeds"), model.extract_target_features(work["image"])))
    found["query"] = model.extract_features({"image": work["image"], "text_input": captions}).multimodal_embeds
    found["text"] = model.extract_features({"text_input": captions}, mode="text").text_embeds
    found["similarity"] = model.inference(found["embeds"], found["features"], captions)
    samples = {"image": work["image"], "target": work["target"], "query_id": work["ids"], "text_input": captions}
    draws = {name[6:]: value for name, value in work.items() if name.startswith("draws.")}
    found.update(model.train()(samples, {**draws, "dsu_gate": 0.0}))
    found = {name: value.detach().clone().contiguous() for name, value in found.items()}
    save_file(found, folder / f"{kind}.found.safetensors")
    exported = {name: value.clone().contiguous() for name, value in official_state_dict(model).items()}
    save_file(exported, folder / f"{kind}.exported.safetensors")
    (folder / f"{kind}.cleaned.json").write_text(json.dumps(text["eval"]("A  Red (coat), please!")), encoding="utf-8")
# The paper's configuration is known to LAVIS; building it would download four gigabytes.
from omegaconf import OmegaConf  # noqa: E402

config = OmegaConf.load(fafa.lavis_plugin.LavisFAFACPR.default_config_path("pretrain"))
assert config.model.vit_model == "eva_clip_g" and config.preprocess.vis_processor.eval.image_size == 224
from fafa import load_model_and_preprocess as ours  # noqa: E402

try:
    ours("blip2_fafa_cpr", str(folder / "eva_clip_g.yaml"))
except ValueError as error:
    assert "5.17" in str(error), error
else:
    raise AssertionError("the package's own model must refuse the transformers of this environment")
print("done")
