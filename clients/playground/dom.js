// The few helpers over the DOM. Text only ever enters as textContent: token texts are untrusted.

export function el(tag, { class: className, text, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === undefined || value === null) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

export function svg(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// Elements of a cloned template by their data-part name.
export function parts(root) {
  const found = {};
  for (const node of root.querySelectorAll("[data-part]")) found[node.dataset.part] = node;
  return found;
}

let counter = 0;

export function uniqueId(prefix) {
  counter += 1;
  return `${prefix}-${counter}`;
}

const status = () => document.getElementById("status");

// One polite live region for the whole page.
export function announce(message) {
  status().textContent = message;
}

export async function copyText(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    announce(`${what} copied.`);
  } catch {
    // No clipboard outside https and localhost: offer the text to copy by hand.
    const dialog = document.getElementById("copy-dialog");
    dialog.querySelector("h2").textContent = `Copy: ${what}`;
    const area = dialog.querySelector("textarea");
    area.value = text;
    dialog.showModal();
    area.select();
  }
}

// Runs `flush` at most once per frame, however often it is asked for.
export function perFrame(flush) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      flush();
    });
  };
}
