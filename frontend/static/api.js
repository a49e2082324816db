// What the page asks of the server: completions as a stream, and plain questions. Knows nothing of the page.

/** An answer that is an error, with the request's field that is at fault where the server names one. */
export class ApiError extends Error {
  constructor(message, param = null, status = 0) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

export function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The chunks of a chat completion, as they come. Throws ApiError, and AbortError when `signal` is aborted. */
export async function* streamChat(body, key, signal) {
  let response;
  try {
    response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers(key) },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await asError(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.param);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.");
}

async function asError(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, error.param, response.status);
  } catch {
    return new ApiError(`The server answered with status ${response.status}.`, null, response.status);
  }
}

/** The data of server-sent events. Reading may cut them, and even a character, anywhere. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    while (true) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection was lost.");
      });
      if (done) return;
      const parts = (held + value).split("\n\n");
      held = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
