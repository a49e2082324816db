// An answer's text as elements: paragraphs, headings, code, bold. Makes elements only, so that no answer can be markup.

/** Splits a text into blocks `{ kind: "code" | "heading" | "text", text }`. A fence that is not closed yet counts. */
export function blocks(text) {
  const found = [];
  let lines = [];
  let fence = null;
  const flush = (kind) => {
    const joined = lines.join("\n");
    if (kind === "code" || joined.trim()) found.push({ kind, text: kind === "code" ? joined : joined.trim() });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = /^\s*(```+|~~~+)/.exec(line)?.[1];
    if (fence !== null) {
      if (mark?.startsWith(fence)) {
        flush("code");
        fence = null;
      } else lines.push(line);
    } else if (mark) {
      flush("text");
      fence = mark;
    } else if (/^#{1,6} /.test(line)) {
      flush("text");
      lines = [line.replace(/^#+ /, "")];
      flush("heading");
    } else if (line.trim() === "") flush("text");
    else lines.push(line);
  }
  flush(fence === null ? "text" : "code");
  return found;
}

function element(block) {
  if (block.kind === "code") {
    const pre = document.createElement("pre");
    pre.tabIndex = 0;
    pre.append(Object.assign(document.createElement("code"), { textContent: block.text }));
    return pre;
  }
  const node = document.createElement("p");
  if (block.kind === "heading") node.className = "heading";
  for (const part of block.text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) {
      node.append(Object.assign(document.createElement("code"), { textContent: part.slice(1, -1) }));
    } else if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) {
      node.append(Object.assign(document.createElement("strong"), { textContent: part.slice(2, -2) }));
    } else node.append(part);
  }
  return node;
}

/** Shows a text that grows. Only blocks that changed are made anew, so that what is selected above stays so. */
export class GrowingText {
  constructor(container) {
    this.container = container;
    this.shown = [];
  }

  show(text) {
    const next = blocks(text);
    next.forEach((block, index) => {
      const old = this.shown[index];
      if (old && old.kind === block.kind && old.text === block.text) return;
      const node = element(block);
      if (this.container.children[index]) this.container.children[index].replaceWith(node);
      else this.container.append(node);
    });
    while (this.container.children.length > next.length) this.container.lastChild.remove();
    this.shown = next;
  }
}
