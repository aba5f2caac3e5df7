"use strict";

// A theme that the reader chose goes before that of the system; set before anything is drawn.
const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const remembered = {
  get() { try { return localStorage.getItem("andmask-theme"); } catch { return null; } },
  set(theme) { try { localStorage.setItem("andmask-theme", theme); } catch { /* a private window */ } },
};
const chosen = remembered.get();
if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
const isDark = () => (root.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];

function startTheme() {
  const button = document.getElementById("theme");
  const tell = () => { button.textContent = isDark() ? "Light mode" : "Dark mode"; };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered.set(root.dataset.theme);
    tell();
  });
  systemDark.addEventListener("change", tell);
  tell();
  button.hidden = false;
}

// Sorting: up, down, as it was. Rows that tie keep their order, and empty cells stay at the end.
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

const isMissing = (cell) => cell.textContent.trim() === "–";

function compareCells(one, other, sign, numeric) {
  const missing = isMissing(one) - isMissing(other);
  if (missing || isMissing(one)) return missing;
  if (numeric) return sign * (Number(one.dataset.key) - Number(other.dataset.key));
  return sign * collator.compare(one.textContent.trim(), other.textContent.trim());
}

function makeSortable(table) {
  const heads = all("thead th", table);
  const body = table.tBodies[0];
  const original = [...body.rows];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.dataset.name = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      const rows = [...original];
      if (before !== "descending") {
        const sign = before === "ascending" ? -1 : 1;
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const cells = rows.map((row) => row.cells[column]);
        const numeric = cells.every((cell) => isMissing(cell) || "key" in cell.dataset);
        rows.sort((a, b) => compareCells(a.cells[column], b.cells[column], sign, numeric));
      }
      body.append(...rows);
    });
  });
}

// Filtering: all words must be in the row; "lr=0.1" asks for a cell of the column of that name.
const plain = (text) => text.trim().toLowerCase().replace(/\s+/g, "_");

function makeFilter(box) {
  const [input, told] = [box.querySelector("input"), box.querySelector("output")];
  const table = box.parentElement.querySelector("table");
  const names = all("thead th", table).map((head) => plain(head.dataset.name));
  const rows = all("tbody tr", table);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const cells = [...row.cells].map((cell) => plain(cell.textContent));
      const text = cells.join(" ");
      row.hidden = !words.every((word) => {
        const [name, value] = word.split("=", 2);
        const column = value ? names.indexOf(name) : -1;
        return column < 0 ? text.includes(word) : cells[column] === value;
      });
      shown += !row.hidden;
    }
    told.textContent = words.length ? `${shown} of ${rows.length} runs` : "";
  });
  box.hidden = false;
}

function makeCopy(button) {
  const code = button.previousElementSibling;
  button.hidden = false;
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);  // where the browser does not let us: Ctrl-C does
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

function startZoom() {
  const dialog = document.getElementById("zoom");
  const large = dialog.querySelector("img");
  for (const paper of all(".paper")) {
    const picture = paper.querySelector("img");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "paper";
    button.setAttribute("aria-label", `Enlarge: ${picture.alt}`);
    button.append(picture);
    paper.replaceWith(button);
    button.addEventListener("click", () => {
      large.src = picture.src;
      large.alt = picture.alt;
      dialog.classList.remove("natural");
      dialog.showModal();
    });
  }
  large.addEventListener("click", (event) => {
    event.stopPropagation();
    dialog.classList.toggle("natural");
  });
  dialog.addEventListener("click", () => dialog.close());
}

// A link into something folded opens it.
function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (!target) return;
  for (const details of all(":scope > details.long", target)) details.open = true;
  target.scrollIntoView();
}

function startContents() {
  const contents = document.getElementById("contents");
  if (matchMedia("(max-width: 40rem)").matches) contents.open = false;
  const links = new Map(all("a", contents).map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -80%" });
  links.forEach((_, id) => watch.observe(document.getElementById(id)));
}

document.addEventListener("DOMContentLoaded", () => {
  startTheme();
  all("table").forEach(makeSortable);
  all(".filter").forEach(makeFilter);
  all(".copy").forEach(makeCopy);
  startZoom();
  startContents();
  openTarget();
});
addEventListener("hashchange", openTarget);
addEventListener("beforeprint", () => all("details").forEach((each) => { each.open = true; }));
