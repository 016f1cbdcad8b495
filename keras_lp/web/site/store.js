/** Keeps trained weights in the browser, per model. */

function transaction(mode, work) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open('keras_lp', 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore('weights');
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
      const database = opening.result;
      const request = work(database.transaction('weights', mode).objectStore('weights'));
      request.transaction.oncomplete = () => {
        database.close();
        resolve(request.result);
      };
      request.transaction.onerror = () => {
        database.close();
        reject(request.error);
      };
    };
  });
}

/** Stores weights of a model. */
export const keep = (model, weights) => transaction('readwrite', store => store.put(weights, model));

/** Returns the stored weights of a model, undefined without any. */
export const kept = model => transaction('readonly', store => store.get(model));

/** Deletes the stored weights of a model. */
export const drop = model => transaction('readwrite', store => store.delete(model));
