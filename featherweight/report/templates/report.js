
"use strict";
(function () {
  function all(selector, root) { return Array.prototype.slice.call((root || document).querySelectorAll(selector)); }

  // Sort a table by the column of the heading; numbers by their key, a missing one always last.
  function sort(heading) {
    var table = heading.closest("table"), index = all("th", heading.parentNode).indexOf(heading);
    var down = heading.getAttribute("aria-sort") === "ascending";
    var rows = all("tbody tr", table).map(function (row) {
      var cell = row.children[index], key = cell.getAttribute("data-key");
      return { row: row, key: key === null ? cell.textContent.trim().toLowerCase() : key === "" ? null : Number(key) };
    });
    rows.sort(function (a, b) {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return (a.key < b.key ? -1 : a.key > b.key ? 1 : 0) * (down ? -1 : 1);
    });
    all("th", heading.parentNode).forEach(function (other) { other.removeAttribute("aria-sort"); });
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.forEach(function (item) { item.row.parentNode.appendChild(item.row); });
  }
  all("table.sortable thead th").forEach(function (heading) { heading.addEventListener("click", function () { sort(heading); }); });

  var tabs = all("[role=tab]");
  function choose(tab) {
    tabs.forEach(function (other) {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = other !== tab;
    });
  }
  tabs.forEach(function (tab, place) {
    tab.addEventListener("click", function () { choose(tab); });
    tab.addEventListener("keydown", function (event) {
      var step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      var next = tabs[(place + step + tabs.length) % tabs.length];
      choose(next); next.focus();
    });
  });

  var hint = document.getElementById("hint");
  function show(mark) {
    var box = mark.getBoundingClientRect();
    hint.textContent = mark.getAttribute("data-tip");
    hint.hidden = false;
    var left = Math.min(Math.max(8, box.left + box.width / 2 - hint.offsetWidth / 2), innerWidth - hint.offsetWidth - 8);
    var top = box.top - hint.offsetHeight - 8;
    hint.style.left = left + "px";
    hint.style.top = (top < 8 ? box.bottom + 8 : top) + "px";
  }
  function light(variant, on) {
    all("[data-variant]").forEach(function (item) { if (item.getAttribute("data-variant") === variant) item.classList.toggle("lit", on); });
  }
  // Mark a node, what it was made from, and the edges between.
  function trace(id, on) {
    var pending = [id], seen = {};
    while (pending.length) {
      var here = pending.pop();
      if (seen[here]) continue;
      seen[here] = true;
      all(".edge").forEach(function (edge) {
        if (edge.getAttribute("data-to") !== here) return;
        edge.classList.toggle("lit", on);
        pending.push(edge.getAttribute("data-from"));
      });
    }
    all(".node").forEach(function (node) { if (seen[node.getAttribute("data-node")]) node.classList.toggle("lit", on); });
  }
  function mark(item, on) {
    if (item.hasAttribute("data-tip")) { if (on) show(item); else hint.hidden = true; }
    if (item.hasAttribute("data-variant")) light(item.getAttribute("data-variant"), on);
    if (item.hasAttribute("data-node")) trace(item.getAttribute("data-node"), on);
  }
  all(".point, .node, #variants tbody tr").forEach(function (item) {
    item.addEventListener("mouseenter", function () { mark(item, true); });
    item.addEventListener("mouseleave", function () { mark(item, false); });
    item.addEventListener("focus", function () { mark(item, true); });
    item.addEventListener("blur", function () { mark(item, false); });
  });
  addEventListener("keydown", function (event) { if (event.key === "Escape") hint.hidden = true; });
  addEventListener("scroll", function () { hint.hidden = true; }, { passive: true });
  document.documentElement.setAttribute("data-ready", "true");
})();
