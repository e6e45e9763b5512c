/* SPDX-License-Identifier: Apache-2.0 */
"use strict";
/* The text about a parameter, beside what the mouse is over or the keyboard is at. Without this
 * script the page is complete: links of the map lead to rows, which say the same. */
const panel = document.getElementById("tip");

let shown = null;

function show(target) {
  const said = document.getElementById(target.getAttribute("aria-describedby"));
  panel.replaceChildren(said.cloneNode(true));
  panel.firstChild.hidden = false;
  panel.firstChild.removeAttribute("id");
  panel.hidden = false;
  shown = target;
  place();
}

function place() {
  if (!shown) return;
  const at = shown.getBoundingClientRect();
  const own = panel.getBoundingClientRect();
  const below = at.bottom + 8 + own.height <= window.innerHeight;
  const top = below ? at.bottom + 8 : Math.max(8, at.top - own.height - 8);
  const left = Math.max(8, Math.min(at.left, window.innerWidth - own.width - 8));
  panel.style.top = top + "px";
  panel.style.left = left + "px";
}

function hide() {
  panel.hidden = true;
  shown = null;
}

function described(event) {
  return event.target.closest ? event.target.closest("[data-tip]") : null;
}

for (const name of ["mouseover", "focusin"]) {
  document.addEventListener(name, (event) => {
    const target = described(event);
    if (target) show(target);
    else hide();
  });
}
document.addEventListener("focusout", hide);
/* A focus that moves the page must not lose its text. */
document.addEventListener("scroll", place, { passive: true });
window.addEventListener("resize", place);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
});

/* A link of the map leads to a row, which may be in a group that is closed. */
document.addEventListener("click", (event) => {
  const link = event.target.closest ? event.target.closest("a[data-tip]") : null;
  if (!link) return;
  const row = document.getElementById(link.getAttribute("href").slice(1));
  row.closest("details").open = true;
  row.focus({ preventScroll: true });
  row.scrollIntoView({ block: "center" });
  show(row);
  event.preventDefault();
});

/* On paper everything is open. */
window.addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});
