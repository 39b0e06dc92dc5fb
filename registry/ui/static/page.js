// What pages can do with JavaScript: copy texts, show times in the visitor's time zone, choose all rows of a list, and
// ask questions in dialogs. Pages can be read and used without this script. The script htmx loads parts of pages later;
// after each such change, `improve` runs again.

import { asksByDialog, askByDialog } from "./questions.js";

const said = document.getElementById("said"); // screen readers say the text of this element when it changes

const timeFormat = new Intl.DateTimeFormat(document.documentElement.lang, { dateStyle: "medium", timeStyle: "short" });

/** Shows the times below an element in the visitor's time zone; UTC stays as the title. */
function showLocalTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]:not([title])")) {
    const moment = new Date(element.dateTime);
    if (!Number.isNaN(moment.getTime())) {
      element.title = element.textContent;
      element.textContent = timeFormat.format(moment);
    }
  }
}

/** Puts the time in the visitor's time zone into the titles of the ages below an element. */
function showLocalTitles(root) {
  for (const element of root.querySelectorAll("time[data-age]")) {
    element.title = timeFormat.format(new Date(element.dateTime));
  }
}

/** Shows the copy buttons below an element, which do nothing without JavaScript. */
function showCopyButtons(root) {
  for (const button of root.querySelectorAll("button[data-copy][hidden]")) {
    button.hidden = false;
  }
}

/** Copies a text. Browsers have `navigator.clipboard` only on pages with https, and on pages from their own machine. */
async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  if (!isCopied) {
    throw new Error("the browser did not copy the text");
  }
}

async function onCopy(button) {
  try {
    await copyText(button.dataset.copy);
  } catch {
    return; // the text is on the page, and can be selected
  }
  button.focus();
  button.classList.add("copied");
  said.textContent = ""; // so that screen readers say the same word again
  requestAnimationFrame(() => {
    said.textContent = said.dataset.copied;
  });
  setTimeout(() => button.classList.remove("copied"), 1500);
}

/** Returns the boxes of all rows. `chooser`: the box that checks or clears them together. */
function boxesOf(chooser) {
  return [...chooser.form.querySelectorAll(`input[type="checkbox"][name="${chooser.dataset.chooseAll}"]`)];
}

/** Shows the boxes below an element that choose all rows. Each is checked if all its rows are chosen, and
    indeterminate if only some are. */
function showChoosers(root) {
  for (const chooser of root.querySelectorAll("input[data-choose-all]")) {
    const boxes = boxesOf(chooser);
    const count = boxes.filter((box) => box.checked).length;
    chooser.checked = count > 0 && count === boxes.length;
    chooser.indeterminate = count > 0 && count < boxes.length;
    chooser.closest("[hidden]")?.removeAttribute("hidden");
  }
}

function onChoice(box) {
  if (box.dataset.chooseAll) {
    const limit = Number(box.dataset.chooseAtMost);
    boxesOf(box).forEach((each, index) => {
      each.checked = box.checked && index < limit;
    });
  }
  showChoosers(document);
}

function improve(root) {
  showLocalTimes(root);
  showLocalTitles(root);
  showCopyButtons(root);
  showChoosers(root);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button[data-copy]");
  if (button) {
    onCopy(button);
  }
});
document.addEventListener("change", (event) => {
  if (event.target.type === "checkbox") {
    onChoice(event.target);
  }
});
document.addEventListener("submit", (event) => {
  if (asksByDialog(event.submitter)) {
    event.preventDefault();
    askByDialog(event.target, event.submitter);
  }
});
document.addEventListener("htmx:afterSettle", () => improve(document));
improve(document);
