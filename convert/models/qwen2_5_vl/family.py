"""Stock Qwen2.5-VL as a model family. Its checkpoints get the gates that it lacks."""

from convert.models import videonsa
from convert.models.family import Family, Lack
from convert.models.qwen2_5_vl import config, rows
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.model.model import VideoNSA

FAMILY = Family(
    name="qwen2_5_vl",
    architecture=config.ARCHITECTURE,
    model_type=config.MODEL_TYPE,
    config_class=ModelConfig,
    model=VideoNSA,
    rows=rows.rows,
    read_config=config.read,
    write_config=config.write,
    prefixes=rows.PREFIXES,
    tied=rows.tied,
    free_fields=(*config.FREE_FIELDS, "nsa."),
    transformers_class=config.ARCHITECTURE,
    lacks=Lack("gates", videonsa.FAMILY),
)
