"""Task datasets on the Hub, as raw task files."""
import re


def hub_items(row, hub):
    """Yields the src_info fields of each sample in a row of a Hub dataset (see [hub] in configs/task)."""
    info = {field: row[column] or "" for field, column in hub["columns"].items()}
    if "labels" in hub:
        label = row[hub["labels"]["column"]]
        if label is None or label < 0:  # datasets mark a missing label with -1
            return
        info[hub["labels"]["field"]] = hub["labels"]["names"][label]
    if "references" in hub and len(row[hub["references"]] or []) > 1:
        info["references"] = row[hub["references"]]
    if "dialogue" not in hub:
        yield info
        return
    turns = [turn["content"].strip() for turn in row[hub["dialogue"]]]
    for index in range(1, len(turns), 2):  # the listener's turns
        yield info | {"input_text": "\n".join(f"- {turn}" for turn in turns[:index]), "output_text": turns[index]}


def raw_files(items, spec):
    """Raw task files {prompt_name: {src, tgt, src_info}} from src_info fields, with the task's own wordings in turn."""
    wordings = [(name, wording) for name, wordings in spec["prompts"].items() for wording in wordings]
    files = {name: {"src": [], "tgt": [], "src_info": []} for name in spec["prompts"]}
    for index, info in enumerate(items):
        name, wording = wordings[index % len(wordings)]
        files[name]["src"].append(re.sub(r"\[(\w+)\]", lambda match, info=info: info[match[1]], wording))
        files[name]["tgt"].append(info.get("references", info[spec["target"]]))
        files[name]["src_info"].append(info | {"prompt": wording, "prompt_name": name})
    return files
