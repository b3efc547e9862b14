"""How long the prompts of a file are, for a model whose weights need not be there."""

import pathlib

from checkpoints_tools.hub import download_tokenizer
from checkpoints_tools.progress import progress_bar
from flexjax.arrangement import Group
from flexjax.models.config import OPTConfig, published_name
from flexjax.prompt_file import PromptFile
from flexjax.row_maker import Requests, RowMaker
from flexjax.sampling_params import SamplingParams


def prompt_lengths(
    path: pathlib.Path, model: str, config: OPTConfig, gen_len: int
) -> tuple[list[int], list[Group]]:
    """Tokens of each prompt of a file, and which prompts begin alike.

    Args:
        path: of the file, see `PromptFile`.
        model: a folder, or the Hub id of a model; its tokenizer is wanted where a
            prompt is a text.
        config: of the model.
        gen_len: new tokens of each prompt.

    Raises:
        ValueError: a prompt cannot be used, which is named by its line; or there is no
            tokenizer.
        OSError: the Hub failed.
    """
    folder, params = pathlib.Path(model), SamplingParams(max_tokens=gen_len)
    with PromptFile(path) as prompts:
        has_text = any(isinstance(prompt, str) for prompt in prompts)
        if has_text and not folder.is_dir():
            folder = _tokenizer_folder(path, model)
        maker = RowMaker(config, folder, config.max_position_embeddings)
        requests = Requests(maker, prompts, params=params, indices=None)
        with progress_bar(len(requests), "reading", "prompt") as bar:
            sizes = requests.sizes(bar.update)
    return [size.prompt_len for size in sizes], requests.groups()


def _tokenizer_folder(path: pathlib.Path, model: str) -> pathlib.Path:
    if (short := published_name(model)) is not None:
        # OPT-175B is not on the Hub; all OPT models have one tokenizer.
        model = f"facebook/{'opt-66b' if short == 'opt-175b' else short}"
    try:
        return download_tokenizer(model)
    except ValueError as error:
        raise ValueError(
            f"{path} has texts, for which a tokenizer is needed, but {error}; or give "
            "token ids"
        ) from error
