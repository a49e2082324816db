// Puts the page together.

import { headers } from "./api.js";
import { Chat } from "./chat.js";
import { Engine } from "./engine.js";
import { Options } from "./options.js";

const find = (id) => document.getElementById(id);

const options = new Options(find("fields"), find("changed"), find("field-error"));
new Chat(options);
const engine = new Engine(options);

async function showModel() {
  const response = await fetch("v1/models", { headers: headers(options.key) });
  if (!response.ok) return;
  const [model] = (await response.json()).data;
  find("model").textContent = `${model.id} · ${model.max_model_len.toLocaleString("en")} tokens of context`;
  document.title = `${model.id} · mini-vLLM`;
}

// The model can be another one after a restart.
engine.onready = () => showModel().catch(() => {});
engine.start();
