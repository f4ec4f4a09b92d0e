"use strict";
(() => {
  const root = document.documentElement;
  const stored = {
    // Pages opened as files may be refused storage.
    get() { try { return localStorage.getItem("theme"); } catch { return null; } },
    set(theme) { try { localStorage.setItem("theme", theme); } catch { /* not kept, then */ } },
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const kept = stored.get();
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;

  function themes() {
    const button = document.getElementById("theme");
    const name = () => {
      const other = shown() === "dark" ? "light" : "dark";
      button.textContent = other === "dark" ? "Dark" : "Light";
      button.setAttribute("aria-label", `Switch to the ${other} theme`);
    };
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = shown() === "dark" ? "light" : "dark";
      stored.set(root.dataset.theme);
      name();
    });
    system.addEventListener("change", name);
    name();
  }

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    const bodies = [...table.tBodies].map((body) => ({
      body,
      rows: [...body.rows].filter((row) => !row.classList.contains("group")),
    }));
    const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
    const read = (row, n, numbers) => {
      const cell = row.cells[n];
      if (cell.classList.contains("empty")) return null;
      if (!numbers) return cell.textContent;
      return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
    };
    const sort = (n, way) => {
      const numbers = heads[n].dataset.sort === "number";
      const sign = way === "descending" ? -1 : 1;
      const compare = (a, b) => {
        const [x, y] = [read(a, n, numbers), read(b, n, numbers)];
        // What is missing stays at the end, whichever way.
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (numbers ? x - y : words.compare(x, y));
      };
      for (const { body, rows } of bodies) body.append(...(way === "none" ? rows : [...rows].sort(compare)));
      heads.forEach((head, m) => head.setAttribute("aria-sort", m === n ? way : "none"));
    };
    heads.forEach((head, n) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      if (head.dataset.name) button.setAttribute("aria-label", head.dataset.name);
      head.append(button);
      const first = head.dataset.sort === "number" && head.dataset.better !== "low" ? "descending" : "ascending";
      const second = first === "descending" ? "ascending" : "descending";
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        sort(n, now === "none" ? first : now === first ? second : "none");
      });
    });
  }

  function tips() {
    const tip = document.getElementById("tip");
    const words = new Map();
    const hide = () => { tip.hidden = true; };
    const show = (mark) => {
      tip.textContent = words.get(mark);
      tip.hidden = false;
      const at = mark.getBoundingClientRect();
      const box = tip.getBoundingClientRect();
      const left = at.left + at.width / 2 - box.width / 2;
      const above = at.top - box.height - 6;
      tip.style.left = `${Math.max(6, Math.min(left, root.clientWidth - box.width - 6))}px`;
      tip.style.top = `${above < 6 ? Math.min(at.bottom + 6, innerHeight - box.height - 6) : above}px`;
    };
    const keys = (marks) => (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") return hide();
      const now = marks.indexOf(event.target);
      if (!step || now < 0) return undefined;
      event.preventDefault();
      const next = marks[(now + step + marks.length) % marks.length];
      marks[now].tabIndex = -1;
      next.tabIndex = 0;
      return next.focus();
    };
    for (const figure of document.querySelectorAll("figure.chart, figure.heat")) {
      const marks = [...figure.querySelectorAll(".mark, .cell")];
      for (const mark of marks) {
        // The browser's own tooltip would stand over ours.
        const title = mark.querySelector("title");
        words.set(mark, title ? title.textContent : mark.title);
        if (title) { mark.setAttribute("aria-label", title.textContent); title.remove(); }
        else { mark.setAttribute("aria-description", mark.title.split("\n").pop()); mark.removeAttribute("title"); }
        mark.addEventListener("pointerenter", () => show(mark));
        mark.addEventListener("pointerleave", hide);
        mark.addEventListener("focus", () => show(mark));
        mark.addEventListener("blur", hide);
      }
      figure.addEventListener("keydown", keys(marks));
    }
    addEventListener("scroll", hide, { passive: true, capture: true });
  }

  function position() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
    const places = [...document.querySelectorAll("section[id], figure[id]")].filter((place) => links.has(place.id));
    const mark = () => {
      const passed = places.filter((place) => place.getBoundingClientRect().top < 120).pop();
      for (const [id, link] of links) {
        if (passed && id === passed.id) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    };
    let waiting = false;
    addEventListener("scroll", () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; mark(); });
    }, { passive: true });
  }

  document.addEventListener("DOMContentLoaded", () => {
    themes();
    document.querySelectorAll("table.sortable").forEach(sortable);
    tips();
    position();
  });
})();
